-- Which event the crashes at a place are of: a topic that was made anew has others where these stood. A program of before leaves it
-- out, and its crashes count for whatever stands there.
ALTER TABLE crashes ADD COLUMN event uuid;
