"""The audit: what really leaves a client, against what is claimed. Drives the shipped apps over the in-process Grid."""
