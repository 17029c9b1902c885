# SPDX-License-Identifier: Apache-2.0
"""A job carried out by an engine, with everything it gives on disk."""
