# SPDX-License-Identifier: Apache-2.0
"""Federated training and fine-tuning of large models, for organisations that may not pool their data."""
