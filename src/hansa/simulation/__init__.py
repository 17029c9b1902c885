# SPDX-License-Identifier: Apache-2.0
"""Engines that run all sites on one machine, and runs: jobs carried out by an engine, with results on disk."""
