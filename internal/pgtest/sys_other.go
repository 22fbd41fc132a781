//go:build !linux && !darwin && !freebsd

package pgtest

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
)

// On other systems the package compiles, so that what imports it does, and New
// returns errSystem.

const (
	sigFast      = syscall.Signal(2)
	sigSmart     = syscall.Signal(15)
	sigImmediate = syscall.Signal(3)
	sigKill      = syscall.Signal(9)
	sigReload    = syscall.Signal(1)
	sigStop      = syscall.Signal(19)
	sigCont      = syscall.Signal(18)
)

const (
	lockShared = iota
	lockExclusive
	lockTry
)

var errSystem = errors.New("pgtest: this operating system is not supported")

type account struct {
	uid   int
	other bool
}

func serverAccount() (account, error)        { return account{}, errSystem }
func (account) apply(*exec.Cmd)              {}
func (account) own(string) error             { return errSystem }
func (account) reaches(os.FileInfo) bool     { return false }
func kill(int, syscall.Signal) error         { return errSystem }
func ownerOf(os.FileInfo) int                { return -1 }
func lockFile(string, int) (*os.File, error) { return nil, errSystem }
func lockByte(*os.File, int64) error         { return errSystem }
func unlockByte(*os.File, int64) error       { return errSystem }
func freeBytes(string) uint64                { return 0 }
