#!/bin/sh
# Init of the guest whose work is real: `bench=unpack` unpacks an archive into memory again and
# again, `bench=database` runs transactions. Prints `work` after each piece of it.
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs devtmpfs /dev 2>/dev/null
mount -t tmpfs -o size=80% tmpfs /tmp
say() { echo "<0>bench $*" > /dev/kmsg; }
say init 1

unpack() {
    rm -rf /tmp/tree
    mkdir /tmp/tree
    tar xzf /modules.tar.gz -C /tmp/tree
}

# All of sqlite is in /lib, with the dynamic linker.
sql() { /lib/ld-linux-x86-64.so.2 --library-path /lib /lib/sqlite3 /tmp/bank.db; }

# One branch, 10 tellers, 100,000 accounts of about 100 bytes, of which 20 are random.
fill() {
    sql << 'END'
PRAGMA journal_mode = WAL;
CREATE TABLE branches (bid INTEGER PRIMARY KEY, balance INT, filler TEXT);
CREATE TABLE tellers (tid INTEGER PRIMARY KEY, bid INT, balance INT, filler TEXT);
CREATE TABLE accounts (aid INTEGER PRIMARY KEY, bid INT, balance INT, filler TEXT);
CREATE TABLE history (tid INT, bid INT, aid INT, delta INT, at TEXT, filler TEXT);
INSERT INTO branches VALUES (1, 0, 'branch');
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10)
    INSERT INTO tellers SELECT i, 1, 0, 'teller' FROM n;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
    INSERT INTO accounts SELECT i, 1, 0,
        'customer ' || i || ', card ' || hex(randomblob(10)) || ', opened at branch 1, active' FROM n;
END
}

# 1,000 transactions; what is random in them is chosen when they run.
transactions() {
    for _ in $(seq 1000); do
        cat << 'END'
BEGIN;
UPDATE accounts SET balance = balance + random() % 5000 WHERE aid = 1 + abs(random()) % 100000;
SELECT balance FROM accounts WHERE aid = 1 + abs(random()) % 100000;
UPDATE tellers SET balance = balance + random() % 5000 WHERE tid = 1 + abs(random()) % 10;
UPDATE branches SET balance = balance + random() % 5000 WHERE bid = 1;
INSERT INTO history SELECT abs(random()) % 10, 1, abs(random()) % 100000, random() % 5000, datetime(), 'entry';
COMMIT;
END
    done
}

if [ "$bench" = database ]; then
    fill > /dev/null
    transactions > /tmp/transactions.sql
    work() { sql < /tmp/transactions.sql > /dev/null; }
else
    work() { unpack; }
fi
while work; do say work 1; done
say failed "$bench"
