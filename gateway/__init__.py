"""servo-gateway: worker -> link -> stamp -> journal -> publisher -> Kafka, and commands back the same way.

``gateway.app`` is the composition root and reads as that line; every other module has one job and imports leftwards.
"""
