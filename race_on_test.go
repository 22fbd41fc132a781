//go:build race

package multipool

// raceEnabled says that the race detector slows everything down several times: times are printed and not judged.
const raceEnabled = true
