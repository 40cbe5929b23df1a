"""How systems act on a model without a change to its code: `attach`, the stations (`system`), the token ledger (`tokens`).

Authors of systems need `system.System` and `attention.Edit`, `Probe`, `Only`; docs/architecture.md tells the rest.
"""
