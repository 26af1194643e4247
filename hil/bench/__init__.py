"""Benchmarks against the budgets of the design: ``python -m hil.bench [NAME ...]``. Nothing here is a test.

report      the machine, medians and percentiles, tables
event_cost  one event from the worker link to the broker's acknowledgement   <- pipeline, feeder, peer, meter
cycle       one poll of a bus, and how late a worker's cycles start
logs        recording, replay and export, beside mcap's and python-can's own
gateway_cpu the whole gateway: processor and memory                          <- processes
"""
