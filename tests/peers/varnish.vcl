# The Varnish of the tests: it answers by itself. Its addresses are on its command line.
vcl 4.1;
backend none none;
sub vcl_recv { return (synth(200)); }
