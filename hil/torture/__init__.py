"""Torture: every fault that an arm's gateway has to outlive, alone and all at random; ``python -m hil.torture``.

    faults.py    the faults, each a function; one thread a group, so that faults of different groups overlap
    rig.py       what they are done to: a gateway that is started again whenever it ends, its disk, clock and cluster
    follower.py  a reader of the topic, live, and an issuer of commands
    account.py   what became of every record, from the topics and the journals alone
    run.py       each fault alone, then the mix
    report.py    the table and the JSON

The judge (``hil.judge``) reads what the gateway wrote, and knows nothing of how it works.
"""
