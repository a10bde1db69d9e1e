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

# Whether the program got its bytes to the listener.
reaches() { "$@" 2>/dev/null | grep -q '"outcome":"done"'; }
stays() { ! reaches "$@"; }
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
mcp-sensor doctor
cp /bin/attempt /bin/hashed
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
start
claim sensor_becomes_ready grep -qx ready /run/said
if grep -qx ready /run/said; then
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
    sleep 1
    claim denial_is_an_event grep -q '"verdict":"deny"' /run/events
    kill -9 $sensor
    wait $sensor
    claim unlabelled_connect_after_the_agents_death reaches $attempt
    start --capture syscall
    claim stdio_is_read_where_system_calls_return reads_by syscall
    for write in write writev; do
        claim "a_call_answered_by_${write}_is_recorded_there" makes "$call" --write $write
    done
    claim spliced_bytes_are_counted_there makes '"type":"uninspected".*"how":"splice"' --write splice
else
    cat /run/log
fi
sync
reboot -f
