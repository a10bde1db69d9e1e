"""Reads a collector's events over gRPC without generated code: by reflection.

    subscribe.py ADDRESS CURSOR_FILE COUNT

Begins at the cursor in the file, or at the beginning, prints one line
"SENSOR BOOT SEQ TYPE" per event, keeps the cursor after each response, and
ends when it has COUNT events or more.
"""

import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

address, cursor_file, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
channel = grpc.insecure_channel(address)
reflection = ProtoReflectionDescriptorDatabase(channel)
assert "mcp_sensor.v1.Events" in reflection.get_services()
pool = DescriptorPool(reflection)


def message(name):
    return GetMessageClass(pool.FindMessageTypeByName(f"mcp_sensor.v1.{name}"))


subscribe = channel.unary_stream(
    "/mcp_sensor.v1.Events/Subscribe",
    request_serializer=lambda request: request.SerializeToString(),
    response_deserializer=message("SubscribeResponse").FromString,
)
request = message("SubscribeRequest")(start=2)  # START_BEGINNING, unless there is a cursor
try:
    with open(cursor_file, "rb") as file:
        request.cursor = file.read()
except FileNotFoundError:
    pass
seen = 0
responses = subscribe(request)
for response in responses:
    assert not response.HasField("missed"), response.missed
    for event in response.events:
        print(event.sensor, event.boot, event.seq, event.WhichOneof("body"), flush=True)
    with open(cursor_file, "wb") as file:
        file.write(response.cursor)
    seen += len(response.events)
    if seen >= count:
        break
responses.cancel()
