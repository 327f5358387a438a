"""What a customer did lately, kept current by the event stream and exact at any time t.

docs/reference/windows-sql.md says what each kind of window holds at t, and which SQL is understood.
"""

from datetime import timedelta

from feature_store.windows.declare import event_source, windowed_feature_view
from features.entities import customer

customer_events = event_source(
    topic="customer-events",
    columns={"event_type": "string", "quantity": "int64", "amount_cents": "int64"},
    event_id="event_id",
    # What reaches us more than a week late is dropped, and logged as dropped: state need not be kept for longer.
    retention=timedelta(days=7),
)

customer_behavior = windowed_feature_view(
    name="customer_behavior",
    description="Behaviour over exact, daily, weekly and session windows; a source row is one event of one customer",
    entity=customer,
    source=customer_events,
    path="customer_events",
    sql="""
        -- exactly the last 7 and 30 days
        SELECT customer_id,
               COUNT(*) OVER w7 AS events_7d,
               COUNT(*) OVER w30 AS events_30d,
               SUM(quantity) OVER w7 AS quantity_7d,
               SUM(quantity) OVER w30 AS quantity_30d,
               SUM(amount_cents) OVER w30 AS spend_cents_30d,
               COUNT(*) FILTER (WHERE event_type IN ('ticket', 'cancellation')) OVER w30 AS problems_30d
        FROM events
        WINDOW w7 AS (PARTITION BY customer_id ORDER BY event_timestamp
                      RANGE BETWEEN INTERVAL '7' DAYS PRECEDING AND CURRENT ROW),
               w30 AS (PARTITION BY customer_id ORDER BY event_timestamp
                       RANGE BETWEEN INTERVAL '30' DAYS PRECEDING AND CURRENT ROW);

        -- the week so far; weeks begin on Thursday, as the first day of 1970 did
        SELECT customer_id, COUNT(*) AS events_this_week
        FROM TABLE(TUMBLE(TABLE events, DESCRIPTOR(event_timestamp), INTERVAL '7' DAYS))
        GROUP BY customer_id, window_start, window_end;

        -- the last 90 days up to today: whole days cost no kept events
        SELECT customer_id,
               SUM(amount_cents) AS spend_cents_90d,
               AVG(quantity) AS mean_quantity_90d
        FROM TABLE(HOP(TABLE events, DESCRIPTOR(event_timestamp), INTERVAL '1' DAY, INTERVAL '90' DAYS))
        GROUP BY customer_id, window_start, window_end;

        -- the spell of activity that still lasts: no two events more than 30 days apart
        SELECT customer_id, COUNT(*) AS spell_events, SUM(amount_cents) AS spell_spend_cents
        FROM TABLE(SESSION(TABLE events PARTITION BY customer_id, DESCRIPTOR(event_timestamp), INTERVAL '30' DAYS))
        GROUP BY customer_id, window_start, window_end
    """,
    features={
        "events_7d": ("Events of any type; 0: seen before, quiet now", "events"),
        "events_30d": ("Events of any type; 0: seen before, quiet now", "events"),
        "quantity_7d": ("Minutes used or items bought, net of cancelled ones; null: no event", "minutes or items"),
        "quantity_30d": ("Minutes used or items bought, net of cancelled ones; null: no event", "minutes or items"),
        "spend_cents_30d": ("Money spent, net of refunds; null: no event", "cents"),
        "problems_30d": ("Support tickets and cancellations", "events"),
        "events_this_week": ("Events since the week began; 0: none yet", "events"),
        "spend_cents_90d": ("Money spent in 90 days, today included; null: no event", "cents"),
        "mean_quantity_90d": ("Minutes or items per event in 90 days; null: no event", "minutes or items per event"),
        "spell_events": ("Events since the customer last paused for over 30 days; 0: pausing now", "events"),
        "spell_spend_cents": ("Money spent since that pause, net of refunds; null: pausing now", "cents"),
    },
    history_sql="SELECT event_id, customer_id, event_type, event_timestamp, created, quantity, amount_cents FROM events",
    # A customer silent for 120 days is no longer active (the same horizon as the churn label's).
    ttl=timedelta(days=120),
    owner="churn-team",
)
