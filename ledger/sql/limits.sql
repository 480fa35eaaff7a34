-- name: list
SELECT name, value::text, updated_by, updated_at FROM limits ORDER BY name
