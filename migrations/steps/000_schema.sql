-- The schema beside Feast's own tables, and the record of the steps that made it.
CREATE SCHEMA predictflow;
CREATE TABLE predictflow.schema_version (
    step integer PRIMARY KEY,
    name text    NOT NULL
);
COMMENT ON TABLE predictflow.schema_version IS 'The steps of migrations/steps/ that this database has had';
