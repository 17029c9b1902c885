# SPDX-License-Identifier: Apache-2.0
"""Ready-made training programs, one a task."""
