# SPDX-License-Identifier: Apache-2.0
"""Federated algorithms, one a file, each a value made of pure functions with both its halves in it."""
