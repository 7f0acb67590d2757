"""What the handlers of gRPC calls share."""

import grpc.aio

Context = grpc.aio.ServicerContext[bytes, bytes]


async def next_message(context: Context) -> bytes | None:
    """The next message of a call; None where its peer has nothing more to say or has left, and where the server has
    stopped since the call came.
    """
    try:
        message: object = await context.read()
    except grpc.aio.UsageError:
        raise
    except grpc.aio.BaseError:  # gRPC has no public name for the one that says that the server has stopped
        return None
    return message if isinstance(message, bytes) else None  # else gRPC's EOF
