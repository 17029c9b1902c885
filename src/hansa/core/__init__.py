# SPDX-License-Identifier: Apache-2.0
"""The values that flow through a federation and the seams between its parts. Imports no framework."""
