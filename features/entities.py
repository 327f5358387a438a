"""Who the features are about."""

from feast import Entity, ValueType

customer = Entity(
    name="customer",
    join_keys=["customer_id"],
    value_type=ValueType.STRING,
    description="One paying customer, as the source system numbers them",
    tags={"owner": "churn-team"},
)
