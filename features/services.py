"""What models ask for: a feature service is the contract between a trained model and the server."""

from feast import FeatureService

from features.behavioral_features import customer_behavior
from features.customer_features import churn_features

churn_v1 = FeatureService(
    name="churn_v1",
    description="Input of the churn predictor",
    features=[
        churn_features,
        customer_behavior[
            [
                "events_7d",
                "events_30d",
                "quantity_7d",
                "quantity_30d",
                "spend_cents_30d",
                "problems_30d",
                "events_this_week",
                "spend_cents_90d",
                "mean_quantity_90d",
                "spell_events",
                "spell_spend_cents",
            ]
        ],
    ],
    owner="churn-team",
)
