"""Speech as it is spoken, over WebSockets: OpenAI's realtime transcription and Vosk's protocol.

    connection.py   one WebSocket: its place, its limits, its end
    pcm.py          bytes as they come -> float32 at the model's sample rate
    utterances.py   samples -> where an utterance begins, what is heard of it, where it ends
    recogniser.py   one utterance -> what it seems to say so far, and its transcript
    realtime.py     OpenAI's events        vosk.py   Vosk's messages

The models hear an utterance as a whole. While it is spoken, what there is of it is decoded again and again
(a *look*); the transcript comes from one last pass over all of it.
"""
