# SPDX-License-Identifier: Apache-2.0
"""Differential privacy: what a job promises, the draws that keep it, and the books."""
