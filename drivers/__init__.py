"""Buses and motors: bytes on a wire become samples in SI units, and orders become bytes.

    Bus <-> Family (pure codec) <-> Cycle (deadlines)

Nothing here knows of Kafka, configuration files, journals or anything else of ``gateway``.
"""
