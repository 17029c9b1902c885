# SPDX-License-Identifier: Apache-2.0
"""Observers of rounds. A sink has ``write(record)``, called once a round in order, and ``close()``."""
