"""What a customer did in the last 7 and 30 days, exact at any time t: events with t - window <= event_timestamp <= t."""

from datetime import timedelta

from feature_store.windows import Aggregate, Where, windowed_feature_view
from features.entities import customer

WEEK = timedelta(days=7)
MONTH = timedelta(days=30)
problem = Where("event_type", ("ticket", "cancellation"))

customer_behavior = windowed_feature_view(
    name="customer_behavior",
    description="Behaviour over exact sliding windows; a source row is one event of one customer",
    entity=customer,
    topic="customer-events",
    path="customer_events",
    columns={"event_type": "string", "quantity": "int64", "amount_cents": "int64"},
    event_id="event_id",
    sql="SELECT event_id, customer_id, event_type, event_timestamp, created, quantity, amount_cents FROM events",
    aggregates=[
        Aggregate(
            "events_7d",
            "count",
            window=WEEK,
            description="Events of any type; 0: seen before, quiet now",
            unit="events",
        ),
        Aggregate(
            "events_30d",
            "count",
            window=MONTH,
            description="Events of any type; 0: seen before, quiet now",
            unit="events",
        ),
        Aggregate(
            "quantity_7d",
            "sum",
            "quantity",
            window=WEEK,
            description="Minutes used or items bought, net of cancelled ones; null: no event",
            unit="minutes or items",
        ),
        Aggregate(
            "quantity_30d",
            "sum",
            "quantity",
            window=MONTH,
            description="Minutes used or items bought, net of cancelled ones; null: no event",
            unit="minutes or items",
        ),
        Aggregate(
            "spend_cents_30d",
            "sum",
            "amount_cents",
            window=MONTH,
            description="Money spent, net of refunds; null: no event",
            unit="cents",
        ),
        Aggregate(
            "problems_30d",
            "count",
            window=MONTH,
            where=problem,
            description="Support tickets and cancellations",
            unit="events",
        ),
    ],
    # A customer silent for 120 days is no longer active (the same horizon as the churn label's).
    ttl=timedelta(days=120),
    owner="churn-team",
)
