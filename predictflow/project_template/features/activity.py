"""What a customer did in the last 14 days, kept current by the event stream. Edit it, then run `feast apply`."""

from datetime import timedelta

from feast import FeatureService

from feature_store.windows import Aggregate, Where, windowed_feature_view
from features.account import account, customer

FORTNIGHT = timedelta(days=14)

activity = windowed_feature_view(
    name="activity",
    description="Activity over an exact sliding window; a source row is one event of one customer",
    entity=customer,
    topic="customer-events",
    path="activity",
    columns={"event_type": "string", "quantity": "int64"},
    event_id="event_id",
    sql="SELECT event_id, customer_id, event_type, event_timestamp, created, quantity FROM events",
    aggregates=[
        Aggregate(
            "quantity_14d",
            "sum",
            "quantity",
            window=FORTNIGHT,
            description="Minutes used or items bought, net of cancelled ones; null: no event",
            unit="minutes or items",
        ),
        Aggregate(
            "tickets_14d",
            "count",
            window=FORTNIGHT,
            where=Where("event_type", ("ticket",)),
            description="Support tickets; 0: none",
            unit="events",
        ),
    ],
    # A customer silent for 60 days has no activity worth a prediction.
    ttl=timedelta(days=60),
    owner="me",
)

my_model_v1 = FeatureService(
    name="my_model_v1",
    description="Input of my model",
    features=[account, activity[["quantity_14d", "tickets_14d"]]],
    owner="me",
)
