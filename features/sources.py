"""Where feature rows come from: Parquet directories under the offline store's path, filled by backfill and sync.

Paths are relative to `offline_store.path` of feature_store.yaml, so no registry ever holds a machine's directory.
The SQL in a source's `predictflow.sql` tag is what backfill runs over the raw tables `accounts` and `events`.
"""

from feast import FileSource
from feast.data_format import ParquetFormat

churn_source = FileSource(
    name="churn_features_source",
    path="churn_features",
    file_format=ParquetFormat(),
    timestamp_field="event_timestamp",
    created_timestamp_column="created",
    description="Account statements: one row per customer and statement date; a correction repeats it, newer `created`",
    tags={
        "predictflow.sql": """
            SELECT customer_id, event_timestamp, created,
                   date_diff('day', joined_at, event_timestamp) / 30.4375 AS tenure_months,
                   monthly_charges, contract_months, payment_method
            FROM accounts
        """
    },
)
