"""What a customer did lately, kept current by the event stream. Edit the SQL, then run `feast apply`."""

from datetime import timedelta

from feast import FeatureService

from feature_store.windows.declare import event_source, windowed_feature_view
from features.account import account, customer

customer_events = event_source(
    topic="customer-events",
    columns={"event_type": "string", "quantity": "int64"},
    event_id="event_id",
)

activity = windowed_feature_view(
    name="activity",
    description="Activity over exact and session windows; a source row is one event of one customer",
    entity=customer,
    source=customer_events,
    path="activity",
    sql="""
        -- exactly the last 14 days
        SELECT customer_id,
               SUM(quantity) OVER w14 AS quantity_14d,
               COUNT(*) FILTER (WHERE event_type = 'ticket') OVER w14 AS tickets_14d
        FROM events
        WINDOW w14 AS (PARTITION BY customer_id ORDER BY event_timestamp
                       RANGE BETWEEN INTERVAL '14' DAYS PRECEDING AND CURRENT ROW);

        -- the spell of activity that still lasts: no two events more than 30 days apart
        SELECT customer_id, COUNT(*) AS spell_events
        FROM events GROUP BY customer_id, SESSION(event_timestamp, INTERVAL '30' DAYS)
    """,
    features={
        "quantity_14d": ("Minutes used or items bought, net of cancelled ones; null: no event", "minutes or items"),
        "tickets_14d": ("Support tickets; 0: none", "events"),
        "spell_events": ("Events since the customer last paused for over 30 days; 0: pausing now", "events"),
    },
    # What `predictflow backfill` runs over the raw tables for the events before the stream began.
    history_sql="SELECT event_id, customer_id, event_type, event_timestamp, created, quantity FROM events",
    # A customer silent for 60 days has no activity worth a prediction.
    ttl=timedelta(days=60),
    owner="me",
)

my_model_v1 = FeatureService(
    name="my_model_v1",
    description="Input of my model",
    features=[account, activity[["quantity_14d", "tickets_14d", "spell_events"]]],
    owner="me",
)
