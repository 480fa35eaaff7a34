"""What may be said between stages: event models, topic declarations, the CloudEvents envelope. No I/O.

events     every event, a frozen model with a version
catalog    every topic: name, key, partitions, retention, models
envelope   CloudEvents 1.0 in Kafka binary mode <-> event
money      decimal strings at the edges, integers inside
errors     why a message could not be read
"""
