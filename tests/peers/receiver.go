// A receiver in Go, as its users write one: every connection that is accepted already names the real client.
package main

import (
	"fmt"
	"log"
	"net"
	"os"

	"github.com/pires/go-proxyproto"
	"github.com/pires/go-proxyproto/tlvparse"
)

func main() {
	inner, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	// Headers from the balancer only: anyone else could name any address as its own.
	policy := proxyproto.MustStrictWhiteListPolicy([]string{"127.0.0.1"})
	listener := &proxyproto.Listener{Listener: inner, Policy: policy}
	fmt.Println("listening on", inner.Addr())
	for {
		connection, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go answer(connection.(*proxyproto.Conn))
	}
}

func answer(connection *proxyproto.Conn) {
	defer connection.Close()
	client, header := connection.RemoteAddr(), connection.ProxyHeader()
	if header == nil {
		fmt.Println("no header from", client)
		return
	}
	tlvs, err := header.TLVs()
	if err != nil {
		fmt.Println("bad TLVs from", client, err)
		return
	}
	line := fmt.Sprintf("v%d %v %s", header.Version, client, tlvparse.FindAWSVPCEndpointID(tlvs))
	fmt.Println(line)
	fmt.Fprintln(connection, line)
}
