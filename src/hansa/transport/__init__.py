# SPDX-License-Identifier: Apache-2.0
"""The network: messages, files in content-addressed pieces, and the mutually authenticated connection they take."""
