"""Several processes that answer the CA's calls, so that all cores work: who does what, and why so.

One process, the parent, keeps the CA; the others, the workers, do what takes processor time: TLS, HTTP/2, proofs, CSRs,
signatures. The parent owns whatever there is one of. It opens the listening socket, the signer, the deny list and the
issuers' key sets, follows their files, and serves the admin server. It has the places of connections, the callers'
quotas, the requests in work, the counts, and it alone writes the audit log and the server's own log. A worker asks it
three times for each certificate: whether the caller is within its quota, whether there is a place, and to write the
audit line; the last answer comes before the certificate is given out. All of it goes over one Unix socket between the
two (`channel`, `messages`). The parent pushes what has changed: the signer with its lists, denied identities, keys.

Join tokens need no owner: a symbolic link spends one, which the file system grants once, to whatever process
(`tokens`). Serial numbers are 128 random bits, so there is one space of them too.

Weighed and left:

- Workers that each accept, by SO_REUSEPORT or on one listening socket. Callers keep their connections, a few each, so
  what the kernel's hash gives one worker too many stays there; and the connections in the queue of a worker that dies
  die with it. The parent accepts, and gives each connection to the worker with fewest (SCM_RIGHTS, unix(7)); it has
  then the one count of places per origin and in all.
- Quotas in shared memory under a lock. A worker that is stopped in between would hold up all others, and a table of a
  hundred thousand callers without Python's dictionary is much code. The questions cost 0.05 ms of processor time a
  certificate with 16 callers at each worker and up to 0.2 ms with 4, beside 0.5 ms for all else; the parent's part is
  0.06 to 0.12 ms, so that it can have some ten workers that are busy all the time.
- Workers that append to the audit log themselves. A line that a full disk or a full pipe takes in part, the reserve for
  a full disk, the budgets for refusals, and the count of lines left out are all of one writer.
- fork(2) in place of exec: it must come before gRPC's first thread, also for a worker that takes a dead one's place,
  and shares little, since Python writes to every object that it reads. A worker has 27 MB of its own (59 resident), the
  parent 22 (41), where one process without workers has 28 (60).

A worker whose parent ends finds the socket closed and ends at once; before that it could issue nothing either, as it
gets no audit line written. A worker that ends is an error in the log (`worker_ended`). The parent starts another in its
place, at first at once and then ever later (`pool.Pace`): the server as a whole goes on, since the others lose
nothing by it. The parent asks each worker again and again whether it is alive, and ends one that hangs (`silence`).
Signals go to the parent alone: workers are in sessions of their own, and ignore SIGTERM, SIGINT and SIGHUP, which
service managers send to all processes of a service.
"""
