"""A client of Triton over gRPC, in the environment that has it: requests on stdin, answers on stdout."""

import json
import queue
import sys
import time

import numpy as np
import tritonclient.grpc as grpc

(address,) = sys.argv[1:]
client = grpc.InferenceServerClient(address)
came = queue.Queue()
client.start_stream(callback=lambda result, error: came.put((result, error)))
asked = json.load(sys.stdin)
for number, one in enumerate(asked["requests"]):
    inputs = []
    for name, given in one["inputs"].items():
        values = np.array(given, {"label": np.int64, "seed": np.uint64}.get(name, np.uint8))
        tensor = grpc.InferInput(name, list(values.shape), values.dtype.name.upper())
        tensor.set_data_from_numpy(values)
        inputs.append(tensor)
    client.async_stream_infer(
        one["model"],
        inputs,
        parameters=one["parameters"],
        request_id=str(number),
        enable_empty_final_response=True,
    )
answers = [{"steps": [], "images": None, "error": None} for _ in asked["requests"]]
left = set(range(len(answers)))
while left:
    result, error = came.get(timeout=120)
    if error is not None:  # it has no id, so a test that expects an error sends one request at a time
        answers[0]["error"] = f"{error.status()}: {error.message()}"
        break
    response = result.get_response()
    number = int(response.id)
    images = result.as_numpy("images")
    if images is not None:
        answers[number]["steps"].append(int(result.as_numpy("step")[0]))
        answers[number]["images"] = images.tolist()
    if asked.get("leave_after") and len(answers[number]["steps"]) >= asked["leave_after"]:
        break
    if response.parameters["triton_final_response"].bool_param:
        left.discard(number)
client.stop_stream(cancel_requests=bool(asked.get("leave_after")))
time.sleep(asked.get("linger", 0))
json.dump(answers, sys.stdout)
