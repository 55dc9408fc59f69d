"""Where the bytes go: predicted by a shadow step, measured on the real run, in one Ledger."""
