"""Inbound webhooks: the bridge from a vendor's signed POST to a topic.

source     what a vendor's part must offer: verify the raw bytes, translate them
bridge     the HTTP app: limit, verify, translate, publish, answer
publisher  Kafka behind one call that returns when the broker has it
serve      the two together, from plain arguments
problems   RFC 9457 answers, shared with the API
"""
