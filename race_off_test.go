//go:build !race

package multipool

const raceEnabled = false
