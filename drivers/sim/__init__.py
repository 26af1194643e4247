"""Simulated servo motors that speak the wire protocol, so that any client can talk to them.

Servo (physics) <- Responder (a family's codec, motors' side) <- SimulatedBus (Wire, faults) <- host (pty, python-can)
"""
