"""Features of a customer's account. Edit the SQL and the fields together, then run `feast apply`."""

from datetime import timedelta

from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import Float64, Int64

customer = Entity(
    name="customer",
    join_keys=["customer_id"],
    value_type=ValueType.STRING,
    description="One paying customer, as the source system numbers them",
)

account_source = FileSource(
    name="account_source",
    path="account",  # below PREDICTFLOW_OFFLINE; `predictflow backfill` fills it with what the SQL gives
    file_format=ParquetFormat(),
    timestamp_field="event_timestamp",
    created_timestamp_column="created",
    description="Account statements: one row per customer and statement date; a correction repeats it, newer `created`",
    tags={
        "predictflow.sql": """
            SELECT customer_id, event_timestamp, created,
                   12 * monthly_charges AS yearly_charges,
                   date_diff('day', joined_at, event_timestamp) AS tenure_days
            FROM accounts
        """
    },
)

account = FeatureView(
    name="account",
    description="The account as of its latest statement; a source row is one statement of one customer",
    entities=[customer],
    # Statements come weekly; a customer without one for 30 days has no account any more.
    ttl=timedelta(days=30),
    schema=[
        Field(
            name="yearly_charges",
            dtype=Float64,
            description="What the customer pays per year at today's charges; null: nothing billed yet",
            tags={"unit": "currency per year"},
        ),
        Field(
            name="tenure_days",
            dtype=Int64,
            description="Time since the customer joined; never null",
            tags={"unit": "days"},
        ),
    ],
    source=account_source,
    owner="me",
)
