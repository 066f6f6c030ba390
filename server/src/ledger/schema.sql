-- The columns that are computed cannot differ from the bodies, which the hashes cover.
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY,
    unix_ms INTEGER NOT NULL,
    kind TEXT NOT NULL,
    client TEXT AS (coalesce(body ->> 'client', body ->> 'who')),
    model TEXT AS (body ->> 'model'),
    body TEXT NOT NULL CHECK (json_valid(body)),
    hash BLOB NOT NULL CHECK (length(hash) = 32)
) STRICT;
CREATE INDEX entries_by_time ON entries (unix_ms);
