// Dials NAME:PORT with Go's own resolver and happy eyeballs, and exchanges a line.
package main

import (
	"fmt"
	"net"
	"os"
	"time"
)

func main() {
	conn, err := (&net.Dialer{Timeout: 3 * time.Second}).Dial("tcp", os.Args[1])
	if err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
	fmt.Fprintln(conn, "hello")
	conn.SetReadDeadline(time.Now().Add(2 * time.Second))
	answer := make([]byte, 64)
	n, err := conn.Read(answer)
	if err != nil {
		fmt.Println("no answer:", err)
		os.Exit(1)
	}
	fmt.Printf("answered %d bytes from %s\n", n, conn.RemoteAddr())
}
