# SPDX-License-Identifier: Apache-2.0
"""Client-side transforms of an update, one a file: clip, weigh, then encode for the wire."""
