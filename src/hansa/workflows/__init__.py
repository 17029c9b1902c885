# SPDX-License-Identifier: Apache-2.0
"""Who talks to whom in a round: async generators that yield one RoundRecord a round."""
