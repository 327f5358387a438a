"""Private real Postgres, Redis and Kafka on 127.0.0.1, without Docker: `services.up(home)` is the way in."""
