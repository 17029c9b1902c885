# SPDX-License-Identifier: Apache-2.0
"""A site's agent: it dials out, decides by the site's own policy, and keeps training in processes of their own."""
