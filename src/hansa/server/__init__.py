# SPDX-License-Identifier: Apache-2.0
"""The server of a federation: jobs, their durable state, and what the network may ask of it. It never loads torch."""
