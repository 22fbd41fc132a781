# Waits until its standard input ends, which is when the process that owns the
# cluster in $MULTIPOOL_PG_FOLDER closes it or is gone, and then removes the
# cluster: processes, shared memory, folder.
#
# It may only use what a minimal system has: no ps where there is /proc, and the
# command line is the one thing of another process that needs no privilege to
# read (/proc/<pid>/cwd does when the servers run under another user).
trap '' HUP INT TERM QUIT PIPE
cd / || exit 1
folder=$MULTIPOOL_PG_FOLDER
token=${folder##*/}
case $token in multipool-pg-*) ;; *) exit 1 ;; esac

while read -r _; do :; done

# The cluster's processes carry the name of its folder: postmasters, poolers and
# tools in their arguments, all others in their title, as part of cluster_name. In
# a sandbox it may be all of cluster_name, and others may have started them, which
# therefore go in the same round.
ours() {
	case $1 in
	*postgres*"$token/"* | *initdb*"$token/"* | *pg_rewind*"$token/"* | *pg_basebackup*"$token/"*) return 0 ;;
	"postgres: $token: "* | *patroni*"$token/"* | *etcd*"$token/"* | *pgbouncer*"$token/"* | *haproxy*"$token/"*) return 0 ;;
	esac
	return 1
}

list() {
	if [ -r /proc/self/cmdline ]; then
		for p in /proc/[0-9]*; do
			line=
			IFS= read -r line 2>/dev/null <"$p/cmdline"
			ours "$line" && echo "${p#/proc/}"
		done
	else
		ps -axww -o pid=,command= | while read -r pid line; do
			ours "$line" && echo "$pid"
		done
	fi
}

# In rounds, because a process may be born while the list is made. SIGKILL
# needs no other care: it ends stopped processes as well.
round=0
while [ $round -lt 500 ]; do
	pids=$(list)
	[ -z "$pids" ] && break
	kill -9 $pids
	round=$((round + 1))
	sleep 0.01 || sleep 1
done

# A postmaster that was killed leaves a System V segment, noted in line 7 of
# its pid file as "key id".
for file in "$folder"/*/postmaster.pid; do
	[ -f "$file" ] || continue
	id=
	{
		for _ in 1 2 3 4 5 6; do read -r _; done
		read -r _ id _
	} <"$file"
	case $id in '' | *[!0-9]*) ;; *) ipcrm -m "$id" ;; esac
done

rm -rf "$folder"
