"""Who owns what: chart of accounts, postings, and the one way rows are committed.

accounts   the chart: which accounts exist, whose they are, which may go below zero
posting    transactions of legs, folded over locked balances in memory (pure)
tables     every journaled table, declared once;  rows: how rows are written, by one statement
record     the commit record: everything a commit wrote and wants to say, as bytes
commit     owner rows, epochs, the hash chain, `seal`: the last two statements of every commit
inbox      which events were settled
journal    the relay: commit records to the journal topic, group commit
verify     the invariants
"""
