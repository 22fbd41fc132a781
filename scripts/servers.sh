#!/bin/sh
# Runs the tests that depend most on what a server says and does on the oldest and the newest PostgreSQL that multipool is
# kept to, where these can be fetched. "make test" has the machine's own.
set -eu
cd "$(dirname "$0")/.."
. scripts/tests.sh

# What a statement's end proves; what looks ask; who is the primary; what is read where; what the test clusters do.
exec go run ./internal/versions -here -servers 14,18 $race -run "^Test($(echo '
	NoMoreCautionThanProofNeeds AWriteThatIsStoppedInItsCommit AStalePlanFailsNoRead WhatAReplicaDoesNotKnowYetIsReadOnThePrimary
	RunTx ASecondCommitTouches ACommitThatIsGivenUp AnAnswerCountsOnly
	ALookThatBorrows AReplicaOfAPrimaryThatIdles ReadsFollowTheReplication ABackupIsNoPeer
	ARealServerUnderTwoNames AMistakenPromotion TheOperatorHasATimeline ASecondFailover AServerOfAnotherCluster WritersFollowAPromotion
	WhatWritesThroughQuery WhatActsOnItsServer ADefaultOfSerializable TargetSessionAttrs NoFaultWhenTheServerIsFull
	Stops Switchover Rejoin Follow SyncApply ReplayAndReceiver PasswordAndTLS
' | tr -s ' \n\t' '|' | sed 's/^|//; s/|$//'))" "$@"
