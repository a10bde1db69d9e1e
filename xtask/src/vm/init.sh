#!/bin/busybox sh
# First process of the virtual machine. Says `VM NAME ok` or `VM NAME failed`
# for each claim; what else it prints is for whoever reads the log.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mkdir -p /sys/fs/cgroup /sys/fs/bpf /run /tmp
mount -t cgroup2 none /sys/fs/cgroup
mount -t bpf none /sys/fs/bpf
mount -t tmpfs none /run
mount -t tmpfs none /tmp
ip link set lo up
ip addr add 192.0.2.53/32 dev lo
ip addr add 192.0.2.80/32 dev lo

quick() { grep -q vm_quick /proc/cmdline; }
claim() {
    name=$1
    shift
    if "$@" >/tmp/out 2>&1; then
        echo "VM $name ok"
    else
        echo "VM $name failed"
        cat /tmp/out
    fi
}

# The same where the sensor says that this kernel has what it needs; blank
# elsewhere.
claim_by() {
    if grep -Eq "^hook +$1 +attached" /run/status; then
        shift
        claim "$@"
    else
        echo "VM $2 blank"
    fi
}

# Whether the program got its bytes to the listener.
reaches() { "$@" 2>/dev/null | grep -q '"outcome":"done"'; }
stays() { ! reaches "$@"; }
# Whether the kernel said EPERM, or EACCES where it opened a file.
refused() {
    tried=$("$@" 2>&1)
    echo "$tried"
    echo "$tried" | grep -Eq '"errno":(1|13)[,}]'
}
# The same of every step of several.
all_reach() { "$@" >/tmp/steps 2>/dev/null && ! grep -q '"outcome":"stopped"' /tmp/steps; }
is_stopped() { "$@" >/tmp/steps 2>/dev/null; grep -q '"outcome":"stopped"' /tmp/steps; }
# A file is hashed within a moment of its first exec.
soon() {
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        reaches "$@" && return
        sleep 1
    done
    return 1
}

# An MCP server over two pipes, one call of its only tool.
ask() {
    echo '{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"vm","version":"1"}}}'
    echo '{"jsonrpc":"2.0","method":"notifications/initialized"}'
    echo '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{"bytes":70000}}}'
    sleep 3
}
events() { grep -c "$1" /run/events; }
# Whether one more such event comes of what is run.
tells() {
    kind=$1
    shift
    before=$(events "$kind")
    "$@"
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        [ "$(events "$kind")" -gt "$before" ] && return
        sleep 1
    done
    return 1
}
# The same of a server that makes these calls.
makes() {
    kind=$1
    shift
    tells "$kind" over_pipes "$@"
}
over_pipes() { ask | speak "$@" 2>/run/speak | cat >/dev/null; }
over_http() {
    request='{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{}}}'
    printf 'POST /mcp HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s' ${#request} "$request" |
        nc 127.0.0.1 7002 >/dev/null
}
# Answers any request as a server does that was asked to call a tool.
cat >/bin/answer <<'END'
#!/bin/sh
dd bs=65536 count=1 2>/dev/null >/dev/null
result='{"jsonrpc":"2.0","id":1,"result":{"content":[]}}'
printf 'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s' ${#result} "$result"
END
chmod +x /bin/answer

echo "VM kernel $(uname -r)"
quick || mcp-sensor doctor
cp /bin/attempt /bin/hashed
cp /bin/attempt /bin/held
hash=$(sha256sum /bin/hashed | cut -d ' ' -f 1)
echo "  - {name: hashed, profile: loopback, mode: enforce, match: [{exe: /bin/hashed, sha256: $hash}]}" >>/policy.yaml
attempt dns-answer --to 192.0.2.53 --port 53 --via 192.0.2.80 >/dev/null 2>&1 &
nc -ll -p 7001 -e cat >/dev/null 2>&1 &
# A sensor, ready or ended.
start() {
    : >/run/said
    mcp-sensor run --policy /policy.yaml --control /run/control.sock --state-dir /run/state \
        --events /run/events --release-on-exit "$@" >/run/said 2>/run/log &
    sensor=$!
    waited=0
    while ! grep -qx ready /run/said; do
        waited=$((waited + 1))
        if [ $waited -gt 1200 ] || [ ! -d /proc/$sensor ]; then
            break
        fi
        sleep 0.1
    done
}
reads_by() {
    cat /run/log
    mcp-sensor status --control /run/control.sock
    mcp-sensor status --control /run/control.sock | grep -Eq "stdio +(attached|fallback) +$1 back end"
}
# A unix socket of nobody's, until the machine ends.
serve() {
    tail -f /dev/null | attempt unix-serve -- "$@" >/run/serve 2>&1 &
    until grep -q ready /run/serve 2>/dev/null; do sleep 0.1; done
    rm /run/serve
}
# What BPF LSM closes; each with the proof that it is open to others.
beyond_the_network() {
    mcp-sensor status --control /run/control.sock >/run/status
    serve /run/other.sock stream
    serve /run/named.sock stream
    serve /run/datagrams.sock dgram
    serve @abstract seqpacket
    ln -s /run/other.sock /run/alias.sock
    ln /run/other.sock /run/linked.sock
    tail -f /dev/null &
    other=$!
    for to in other alias linked; do
        claim_by lsm_unix ${to}_unix_socket_is_denied refused held unix-connect -- /run/$to.sock
    done
    claim_by lsm_unix a_datagram_to_another_is_denied refused held unix-sendto -- /run/datagrams.sock
    claim_by lsm_unix an_abstract_socket_is_denied refused held unix-seqpacket -- @abstract
    claim_by lsm_unix a_named_unix_socket_is_reached reaches held unix-connect -- /run/named.sock
    claim_by lsm_unix the_instances_own_unix_socket_is_reached reaches held unix-own -- /run/own.sock
    claim_by lsm_unix unlabelled_reach_unix_sockets all_open \
        "unix-connect -- /run/other.sock" "unix-sendto -- /run/datagrams.sock" "unix-seqpacket -- @abstract"
    for family in "17 3 768" "16 3 16" "38 5 0" "40 1 0"; do
        claim_by lsm_family "family_${family%% *}_is_denied" refused held open-socket -- $family
    done
    claim_by lsm_family route_netlink_is_made reaches held open-socket -- 16 3 0
    claim_by lsm_family unlabelled_make_any_family all_open "open-socket -- 17 3 768" "open-socket -- 16 3 16"
    for reach in ptrace-attach vm-read pidfd-getfd read-environ; do
        claim_by lsm_ptrace "${reach}_of_another_is_denied" refused held $reach -- $other
    done
    claim_by lsm_ptrace ptrace_of_an_own_child_is_left reaches held ptrace-own-child
    claim_by lsm_ptrace unlabelled_trace all_open "vm-read -- $other" "pidfd-getfd -- $other" \
        "read-environ -- $other" "ptrace-attach -- $other"
    claim_by lsm_bpf bpf_is_denied refused held bpf-map
    claim_by lsm_bpf unlabelled_call_bpf all_open bpf-map
    claim_by lsm_kill a_signal_to_the_sensor_is_denied refused held signal -- $sensor 18
    claim_by lsm_kill signals_to_others_are_left reaches held signal -- $other 18
    claim_by lsm_kill unlabelled_signal_the_sensor all_open "signal -- $sensor 18"
    pin=$(find /sys/fs/bpf -path '*/v*/links/egress')
    for take in unlink rename; do
        claim_by lsm_pins "${take}_of_a_pin_is_denied" refused held $take -- $pin
    done
    claim_by lsm_pins unmounting_bpffs_is_denied refused held unmount -- /sys/fs/bpf
    claim_by lsm_pins covering_bpffs_is_denied refused held cover -- /sys/fs/bpf
    claim_by lsm_pins the_pin_is_there test -e "$pin"
    mkdir /run/bpffs && mount -t bpf none /run/bpffs && ln -s x /run/bpffs/a && ln -s x /run/bpffs/b
    claim_by lsm_pins unlabelled_rule_over_a_bpffs all_open "unlink -- /run/bpffs/a" \
        "rename -- /run/bpffs/b" "cover -- /run/bpffs" "unmount -- /run/bpffs" "unmount -- /run/bpffs"
    claim_by lsm_bpf audit_refuses_nothing reaches $as watched -- attempt bpf-map
    sleep 2
    claim_by lsm_bpf audit_records_what_it_would_refuse \
        grep -q '"type":"access".*"would_deny".*"hook":"bpf"' /run/events
    claim_by lsm_unix a_closed_unix_socket_is_an_event grep -q '"type":"unix_connection".*"unix_foreign"' /run/events
    claim_by lsm_ptrace reaching_into_a_process_is_an_event grep -q '"type":"access".*"target_pid":'$other /run/events
}
# What servers say, by the better back end.
messages() {
    claim stdio_is_read_by_functions reads_by function
    call='"type":"tool_call".*"tool":"echo".*"server":"speak".*"outcome":"ok"'
    for write in write writev uring-write uring-writev; do
        claim "a_call_answered_by_${write}_is_recorded" makes "$call" --write $write
    done
    claim a_call_read_by_io_uring_is_recorded makes "$call" --read uring-read
    claim a_call_over_socketpairs_is_recorded tells "$call" \
        attempt mcp-over-sockets --to 127.0.0.1 --program /bin/speak
    $as open -- nc -ll -p 7002 -e /bin/answer >/dev/null 2>&1 &
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        netstat -ltn | grep -q ":7002 " && break
        sleep 1
    done
    claim a_call_over_http_is_recorded \
        tells '"type":"tool_call".*"tool":"echo".*"transport":"http".*"outcome":"ok"' over_http
    claim spliced_bytes_are_counted makes '"type":"uninspected".*"how":"splice"' --write splice
}
messages_by_calls() {
    claim stdio_is_read_where_system_calls_return reads_by syscall
    for write in write writev; do
        claim "a_call_answered_by_${write}_is_recorded_there" makes "$call" --write $write
    done
    claim spliced_bytes_are_counted_there makes '"type":"uninspected".*"how":"splice"' --write splice
}
all_open() {
    for each in "$@"; do
        reaches attempt $each || { echo "not open: $each"; return 1; }
    done
}
start
attempt verified | grep '^VERIFIED '
if grep -qx ready /run/said; then
    echo "VM sensor_becomes_ready ok"
    attempt="attempt tcp-connect --to 127.0.0.1 --port 7001"
    as="mcp-sensor exec --control /run/control.sock --server"
    claim unlabelled_connect_reaches_the_listener reaches $attempt
    claim connect_under_none_is_denied stays $as none -- $attempt
    claim connect_under_a_cidr_rule_reaches_the_listener reaches $as loopback -- $attempt
    claim unrestricted_connect_reaches_the_listener reaches $as open -- $attempt
    hashed="hashed tcp-connect --to 127.0.0.1 --port 7001"
    claim connect_by_a_verified_file_reaches_the_listener soon $hashed
    echo >>/bin/hashed
    claim connect_by_a_changed_file_is_denied stays $hashed
    ask='{"ask":{"name":"api.example.test","kind":1,"to":"192.0.2.53:53","tcp":false}}'
    other='{"ask":{"name":"other.example.test","kind":1,"to":"192.0.2.53:53","tcp":false}}'
    connect='{"connect":{"to":"192.0.2.80:7001"}}'
    named="$as names -- attempt steps --to 192.0.2.53 --"
    claim an_address_is_closed_before_its_name_is_asked is_stopped $named "[$connect]"
    claim another_name_is_not_asked is_stopped $named "[$other]"
    claim an_address_is_open_after_its_name_is_asked all_reach $named "[$ask,$connect]"
    mcp-sensor status --control /run/control.sock
    quick || messages
    sleep 1
    claim denial_is_an_event grep -q '"verdict":"deny"' /run/events
    beyond_the_network
    kill -9 $sensor
    wait $sensor
    claim unlabelled_connect_after_the_agents_death reaches $attempt
    claim_by lsm_unix unix_sockets_stay_closed_without_an_agent refused held unix-connect -- /run/other.sock
    start --capture syscall
    attempt verified | grep '^VERIFIED '
    mcp-sensor status --control /run/control.sock >/run/status
    claim_by lsm_unix unix_sockets_are_closed_after_a_restart refused held unix-connect -- /run/other.sock
    claim_by lsm_unix named_unix_sockets_are_open_after_a_restart reaches held unix-connect -- /run/named.sock
    quick || messages_by_calls
else
    echo "VM sensor_becomes_ready blank"
    cat /run/log
    claim it_says_what_this_kernel_lacks grep -Eq 'core hook|cannot load|has no' /run/log
fi
sync
reboot -f
