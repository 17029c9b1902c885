# SPDX-License-Identifier: Apache-2.0
"""Where training happens: plans carried out at a site, and the warm processes that do it."""
