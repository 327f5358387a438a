"""What a customer's account looks like: tenure, charges, contract, payment."""

from datetime import timedelta

from feast import FeatureView, Field
from feast.types import Float64, Int64, String

from features.entities import customer
from features.sources import churn_source

churn_features = FeatureView(
    name="churn_features",
    description="The account as of its latest statement; a source row is one statement of one customer",
    entities=[customer],
    # Statements come weekly; a customer without one for 30 days has no account any more.
    ttl=timedelta(days=30),
    schema=[
        Field(
            name="tenure_months",
            dtype=Float64,
            description="Time since the customer joined; never null",
            tags={"unit": "months of 30.4375 days"},
        ),
        Field(
            name="monthly_charges",
            dtype=Float64,
            description="What the customer pays per month; null: nothing billed yet",
            tags={"unit": "currency per month"},
        ),
        Field(
            name="contract_months",
            dtype=Int64,
            description="Length of the contract, 1 is month to month; null: the business has no contracts",
            tags={"unit": "months"},
        ),
        Field(
            name="payment_method",
            dtype=String,
            description="How the bill is paid; null: the source does not say",
            tags={"unit": "category"},
        ),
    ],
    source=churn_source,
    owner="churn-team",
    tags={"domain": "account"},
)
