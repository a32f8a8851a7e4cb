"""The ext-proc door: an Endpoint Picker for Envoy's external processing filter.

`session` is the protocol without I/O, `codec` turns protobuf messages into its values and back, `server` is gRPC
around it.
"""
